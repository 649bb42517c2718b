"""What a student can do with the heads of its teachers: one module for each voice."""
