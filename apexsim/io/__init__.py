"""Files in and out; the only room that reads YAML."""
