"""The goals of the project, measured beside what people would run instead."""
