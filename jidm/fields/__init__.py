"""Jacobian fields: how far each image point moves per unit of each joint, computed from a URDF or learned."""
