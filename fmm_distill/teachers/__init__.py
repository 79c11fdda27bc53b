"""Teachers: diffusers pipelines as velocity fields, one file per family, and closed-form fields."""
