package image

import (
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// The wait after a failed pull is the kubelet's: 10 s, doubled each time to 5
// minutes, and begun anew after a success or when the last failure is twice the
// longest wait ago.
const (
	backoffFirst = 10 * time.Second
	backoffMost  = 5 * time.Minute
	backoffReset = 2 * backoffMost
)

// backoffKey is an image, as a pod names it.
type backoffKey struct {
	uid   types.UID
	image string
}

type backoff struct {
	delay time.Duration
	at    time.Time // of the last failure
	err   string
}

// inBackoff tells whether a pull has to wait, until when, and why.
func (m *Images) inBackoff(k backoffKey) (until time.Time, last string, wait bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b := m.mu.backoffs[k]
	if b == nil {
		return time.Time{}, "", false
	}
	until = b.at.Add(b.delay)
	return until, b.err, m.cfg.Now().Before(until)
}

// failed notes a failure and gives the time of the next try.
func (m *Images) failed(k backoffKey, err string) time.Time {
	now := m.cfg.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, b := range m.mu.backoffs {
		if now.Sub(b.at) > backoffReset {
			delete(m.mu.backoffs, k)
		}
	}
	b := m.mu.backoffs[k]
	if b == nil {
		b = &backoff{delay: backoffFirst / 2}
		m.mu.backoffs[k] = b
	}
	b.delay, b.at, b.err = min(2*b.delay, backoffMost), now, err
	return now.Add(b.delay)
}

func (m *Images) succeeded(k backoffKey) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mu.backoffs, k)
}
