package pods

import "time"

// The kubelet's crash loop: the first restart comes at once, the next after 10 s,
// then twice as much, 5 minutes at most. A container that ran for 10 minutes
// begins anew.
const (
	backoffFirst = 10 * time.Second
	backoffMost  = 5 * time.Minute
	backoffReset = 2 * backoffMost
)

// backoff is the crash loop of one container. The zero value has not crashed yet.
type backoff struct {
	delay time.Duration
	at    time.Time // when delay was last raised
}

// left is how long the container that ended at finished has to wait.
func (b *backoff) left(finished, now time.Time) time.Duration {
	if b.delay == 0 || finished.Sub(b.at) > backoffReset {
		return 0
	}
	return min(max(0, b.delay-now.Sub(finished)), b.delay) // the clock may have been set back
}

// next raises the delay, for a start that goes ahead.
func (b *backoff) next(finished, now time.Time) {
	if b.delay == 0 || finished.Sub(b.at) > backoffReset {
		b.delay = backoffFirst
	} else {
		b.delay = min(2*b.delay, backoffMost)
	}
	b.at = now
}

// The pause after a sync that failed: what it waits for usually wakes the pod
// before.
const (
	retryFirst = time.Second
	retryMost  = 15 * time.Second
)

// retry gives the pause after one more failure in a row.
func retry(failures int) time.Duration {
	d := retryFirst
	for range failures - 1 {
		if d *= 2; d >= retryMost {
			return retryMost
		}
	}
	return d
}
