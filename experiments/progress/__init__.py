"""What a run is doing, told from the files of its workdir alone."""
