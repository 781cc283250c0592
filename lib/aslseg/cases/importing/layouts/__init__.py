"""One class for each way to keep scans and labels. A further one is a file here and a line in ``registry.LAYOUTS``."""
