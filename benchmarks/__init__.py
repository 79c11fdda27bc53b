"""What is measured about the package, outside its tests."""
