"""graphopt/capture"""
