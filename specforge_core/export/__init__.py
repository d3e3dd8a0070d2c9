"""From a training checkpoint to the folder that a server loads, and the checks that it is what the server expects."""
