"""A run from configuration to workdir: fields, checks, built parts, and the results it keeps."""
