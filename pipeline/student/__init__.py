"""The student: ReGLA or any timm backbone, its neck and its heads."""
