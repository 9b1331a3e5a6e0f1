"""Skyline beside vLLM, llama.cpp, OpenVINO GenAI and transformers on one CPU: README.md says what is measured and how."""
