"""From a student to folders that stock diffusers loads."""
