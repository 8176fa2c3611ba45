"""What a robot is: URDF files, kinematics, embodiments, their descriptors and registry."""
