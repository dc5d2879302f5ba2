"""`unbraid live RUN`: a page to read and steer a run's features, for this machine and this user alone."""
