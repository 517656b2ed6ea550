"""What every run needs: files, processes, signals and devices."""
