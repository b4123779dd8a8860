"""Published families of video models: each is a specification, its conditioning and its key maps."""
