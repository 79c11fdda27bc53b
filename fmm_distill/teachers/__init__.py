"""Teachers: diffusers pipelines as velocity fields, one file a family; and closed forms."""
