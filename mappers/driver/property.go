package driver

import (
	"bytes"
	"encoding/json"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// defaultPoll is the interval of a property that names none; see [device.Property].
const defaultPoll = time.Second

// property is what a worker knows about one property: when it is due and what
// was last reported. It does no I/O; the caller publishes what reading gives.
type property struct {
	*device.Property
	topic    topic.Topic
	interval time.Duration
	maxAge   time.Duration
	next     time.Time // the next tick
	written  uint64    // counts writes, so that an older read cannot undo one

	value  any             // the last good value reported; nil where there is none
	lv     json.RawMessage // value as it travels
	q      string          // quality reported last
	t      int64           // time reported last
	known  bool            // something was reported or restored
	tried  bool            // something was seen since the worker started
	goodAt time.Time       // when a good value was last read, reported or not
	ack    int64
	err    string
}

func newProperty(p *device.Property, t topic.Topic) *property {
	out := &property{Property: p, topic: t, interval: p.PollInterval.Or(defaultPoll)}
	out.maxAge = p.MaxAge.Or(3 * out.interval)
	return out
}

// restore takes over what the bus or the outbox holds from before. A payload
// that does not fit the property any more gives no value, but its ack counts.
// It tells whether b can stand as it is.
func (p *property) restore(b []byte) bool {
	var r payload.Reading
	if len(b) == 0 || payload.Decode(b, &r) != nil {
		return false
	}
	p.ack, p.err = r.Ack, r.Err
	lv := r.LV
	if r.Good() {
		lv = r.V
	}
	if len(lv) > 0 {
		unbounded := device.Property{Name: p.Name, Type: p.Type} // what was read once may lie outside min and max
		if v, err := unbounded.Decode(lv); err == nil {
			p.value, p.lv = v, lv
		}
	}
	p.known = !r.Good() || p.value != nil
	p.q, p.t = r.Q, r.T
	return p.known
}

// good takes a value that was read; it tells whether that is to be reported.
func (p *property) good(v any, at time.Time) bool {
	enc := p.Type.Encode(v)
	if p.Type != device.JSON && bytes.Equal(enc, []byte("null")) {
		return p.bad(payload.QualityValue, at) // NaN, an infinity, or not of the type
	}
	p.goodAt, p.tried = at, true
	if p.known && p.q == "" && p.value != nil && !p.Changed(p.value, v) {
		return false
	}
	p.set(v, enc, at)
	return true
}

func (p *property) set(v any, enc json.RawMessage, at time.Time) {
	p.value, p.lv, p.q, p.t, p.known = v, enc, "", payload.Millis(at), true
}

// bad takes a quality word; it tells whether that is to be reported.
func (p *property) bad(q string, at time.Time) bool {
	p.tried = true
	if p.known && p.q == q {
		return false
	}
	p.q, p.t, p.known = q, payload.Millis(at), true
	return true
}

// acked takes the end of a target: rev was applied, or was not because of why.
// value is what the device holds then, nil where that is not known.
func (p *property) acked(rev int64, why device.Reason, value any, at time.Time) {
	p.ack, p.err = rev, string(why)
	if value != nil {
		if enc := p.Type.Encode(value); !bytes.Equal(enc, []byte("null")) || p.Type == device.JSON {
			p.goodAt, p.tried = at, true
			p.set(value, enc, at)
		}
	}
	if !p.known {
		// Refused before there was any value: there is nothing good to show.
		p.q, p.t, p.known = payload.QualityStale, payload.Millis(at), true
	}
}

// staleAt is when a good value gets too old; zero where none can.
func (p *property) staleAt() time.Time {
	if !p.Access.Readable() || !p.tried || p.q != "" || p.goodAt.IsZero() {
		return time.Time{}
	}
	return p.goodAt.Add(p.maxAge)
}

// reading is what is to be on the bus now.
func (p *property) reading() payload.Reading {
	r := payload.Reading{T: p.t, Q: p.q, Ack: p.ack, Err: p.err}
	if p.q == "" {
		r.V = p.lv
	} else {
		r.V, r.LV = json.RawMessage("null"), p.lv
	}
	return r
}

// advance moves the next tick beyond now in whole intervals, so that properties
// of one interval stay due together. It gives the number of ticks skipped.
func (p *property) advance(now time.Time) int {
	missed := now.Sub(p.next) / p.interval
	p.next = p.next.Add((missed + 1) * p.interval)
	return int(missed)
}
