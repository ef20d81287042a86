"""Base and adapter become one model, tensor by tensor, and the result is compared with the attached one."""
