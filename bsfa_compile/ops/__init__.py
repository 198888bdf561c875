"""Block-sparse attention: geometry, gate, operators and their CPU and CUDA implementations."""
