"""How fast this machine trains: the layers of a model, whole steps beside the authors' code, and steps that the loader feeds."""
