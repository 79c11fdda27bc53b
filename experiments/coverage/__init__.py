"""Every pipeline class of diffusers' own test suite as a teacher: opened, checked, distilled and exported."""
