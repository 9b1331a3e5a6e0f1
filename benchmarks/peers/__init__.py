"""Skyline beside vLLM, llama.cpp, OpenVINO GenAI and transformers on one CPU: see README.md."""
