"""The student: the teacher's network with a second time, as a flow map."""
