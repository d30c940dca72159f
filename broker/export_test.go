package broker

import (
	"context"
	"time"
)

// SetEventClock gives the event log another clock.
func (b *Broker) SetEventClock(ctx context.Context, now func() time.Time) error {
	return b.Do(ctx, func() []Message {
		b.events.now = now
		return nil
	})
}

// TickEvents does what the broker does once per checkpoint.
func (b *Broker) TickEvents(ctx context.Context) error {
	return b.Do(ctx, func() []Message {
		b.events.tick()
		return nil
	})
}
