"""Speed and memory of engines, pruned and not, and of what users have today, in turns: each in a process of its own (``vflow-export bench``)."""
