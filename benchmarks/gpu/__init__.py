"""One command that spends the minutes of a borrowed GPU on measuring."""
