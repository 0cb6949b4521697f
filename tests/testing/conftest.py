from tests.support.fast import fast as fast
