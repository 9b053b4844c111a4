"""Where things run: command line, tasks, tracking, reports. Imported only by the command line and by those who ask."""
