"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# No single example has a deadline: how long one takes says more about the machine, which has
# other tests to run beside it, than about our code.
settings.register_profile(
    "busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy machine")
