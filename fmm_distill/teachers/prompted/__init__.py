"""Text-to-image, -video and -audio teachers: any stock pipeline, whose network call is found by running it."""
