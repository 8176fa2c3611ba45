"""From measured image motion to joint motion: factors, solvers, the Kalman filter, the tracker and smoothers."""
