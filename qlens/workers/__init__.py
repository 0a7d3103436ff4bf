"""Several processes behind one address: a supervisor, its workers, and what they say to each other."""
