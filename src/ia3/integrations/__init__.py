"""This project's (IA)³ inside other libraries."""
