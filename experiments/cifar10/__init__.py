"""CIFAR-10: a teacher, a student of every loss, and the quality of both within a time limit."""
