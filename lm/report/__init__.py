"""The comparison of finished or unfinished runs. It reads run directories, and nothing else of the trainers."""
