package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/cockroachdb/pebble/v2"
)

// Key spaces of the event log.
const (
	keyEvent = 'e' // + sequence number, 8 bytes big-endian
	keyMark  = 'v' // + node, zero byte, epoch
)

// Event is a record of the event log.
type Event struct {
	// Seq is the record's number; there is none twice, and none is left out.
	Seq uint64
	// Epoch is the run of the broker that gave the number.
	Epoch uint64
	// Time is when the log took it, in milliseconds since 1970; of a gap, when
	// its last event was dropped.
	Time int64

	Topic   string
	Payload []byte
	QoS     byte
	// Expires is when the event dies, in milliseconds since 1970; 0 is never.
	Expires int64
	Props   Props

	// Gap says that the record stands for events that were dropped, Seq the last
	// of them; it has no message then.
	Gap *EventGap

	// Before and Sum are the bytes of all records ever, without this one and with
	// it. The store gives them.
	Before, Sum uint64
}

// EventGap is where a gap begins.
type EventGap struct {
	From   uint64 // the first event that was dropped
	Before uint64 // as the Before of that event
}

// Dropped gives the number of events that a gap stands for, and their bytes.
func (e *Event) Dropped() (count, bytes uint64) {
	if e.Gap == nil {
		return 0, 0
	}
	return e.Seq - e.Gap.From + 1, e.Sum - e.Gap.Before
}

// Mark is the newest event that the cloud broker took of an epoch of a node.
type Mark struct {
	Seq uint64 `json:"seq"`
	// Used orders a node's epochs: the one that took an event last has the
	// largest. It is about the time of that event, in milliseconds since 1970.
	Used int64 `json:"used"`
}

func eventKey(seq uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{keyEvent}, seq)
}

func markKey(node, epoch string) []byte { return key(keyMark, node+"\x00"+epoch) }

// PutEvent appends an event to the log and sets its sums; before is the sum of
// the record before it.
func (b *Batch) PutEvent(e *Event, before uint64) {
	v := encodeEvent(e)
	e.Before, e.Sum = before, before+recordBytes(v)
	binary.LittleEndian.PutUint64(v[sumAt:], e.Sum)
	_ = b.b.Set(eventKey(e.Seq), v, nil)
}

// PutGap puts the marker of a gap in the place of the last event of it. Its
// sums are set already.
func (b *Batch) PutGap(e *Event) {
	v := encodeEvent(e)
	binary.LittleEndian.PutUint64(v[sumAt:], e.Sum)
	_ = b.b.Set(eventKey(e.Seq), v, nil)
}

// fewEvents is up to how many events are deleted one by one: range tombstones
// cost every reader, so a log that is emptied event by event must not leave
// thousands of them.
const fewEvents = 16

// DeleteEvents removes the events from first to last.
func (b *Batch) DeleteEvents(first, last uint64) {
	if last-first < fewEvents {
		for seq := first; seq <= last; seq++ {
			_ = b.b.Delete(eventKey(seq), nil)
		}
		return
	}
	_ = b.b.DeleteRange(eventKey(first), eventKey(last+1), nil)
}

// PutMark stores a mark.
func (b *Batch) PutMark(node, epoch string, m Mark) {
	v := binary.AppendUvarint(nil, m.Seq)
	_ = b.b.Set(markKey(node, epoch), binary.AppendUvarint(v, uint64(m.Used)), nil)
}

// DeleteMark removes a mark.
func (b *Batch) DeleteMark(node, epoch string) { _ = b.b.Delete(markKey(node, epoch), nil) }

// EachMark calls fn for every mark. It stops at fn's first error.
func (s *Store) EachMark(fn func(node, epoch string, m Mark) error) error {
	return s.each(keyMark, func(name string, v []byte) error {
		node, epoch, m, err := decodeMark(name, v)
		if err != nil {
			return err
		}
		return fn(node, epoch, m)
	})
}

func decodeMark(name string, v []byte) (node, epoch string, m Mark, err error) {
	node, epoch, ok := strings.Cut(name, "\x00")
	seq, n := binary.Uvarint(v)
	if !ok || n <= 0 {
		return "", "", m, fmt.Errorf("%w: event mark of %q", errCorrupt, name)
	}
	used, n := binary.Uvarint(v[n:])
	if n <= 0 {
		return "", "", m, fmt.Errorf("%w: event mark of %q", errCorrupt, name)
	}
	return node, epoch, Mark{Seq: seq, Used: int64(used)}, nil
}

// Events gives up to n records of the log in order, beginning with the number
// from or the next one that is there, up to the number to. They are the
// caller's to keep.
func (s *Store) Events(from, to uint64, n int) (out []Event, err error) {
	if from > to {
		return nil, nil
	}
	s.life.RLock()
	defer s.life.RUnlock()
	if err := s.alive(); err != nil {
		return nil, err
	}
	err = s.guard(func() error {
		found, err := s.readEvents(from, to, n)
		out = found
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("store %s: events: %w", s.dir, err)
	}
	return out, nil
}

func (s *Store) readEvents(from, to uint64, n int) (out []Event, err error) {
	o := &pebble.IterOptions{LowerBound: eventKey(from), UpperBound: []byte{keyEvent + 1}}
	if to+1 != 0 {
		o.UpperBound = eventKey(to + 1)
	}
	it, err := s.db.NewIter(o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, it.Close()) }()
	for ok := it.First(); ok && len(out) < n; ok = it.Next() {
		e, err := decodeEvent(it.Key(), it.Value())
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, it.Error()
}

// View opens the store of a folder for reading alone, which changes nothing in
// it, and calls fn with it. [ErrInUse] is wrapped where an agent has it open.
func View(dir string, fn func(*Store) error) error {
	s, err := openReadOnly(dir)
	if err != nil {
		return err
	}
	return errors.Join(fn(s), s.closeReadOnly())
}

// LastEvent gives the newest record of the log.
func (s *Store) LastEvent() (e Event, ok bool, err error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{keyEvent}, UpperBound: []byte{keyEvent + 1}})
	if err != nil {
		return e, false, fmt.Errorf("store %s: events: %w", s.dir, err)
	}
	if it.Last() {
		ok = true
		e, err = decodeEvent(it.Key(), it.Value())
	}
	if err := errors.Join(err, it.Error(), it.Close()); err != nil {
		return e, false, fmt.Errorf("store %s: events: %w", s.dir, err)
	}
	return e, ok, nil
}

// eventKeyLen is the length of a record's key.
const eventKeyLen = 9

func recordBytes(v []byte) uint64 { return uint64(eventKeyLen + len(v)) }

// An event's value is: format byte 1, flags (1: gap), 8 bytes sum (little
// endian), 8 bytes epoch (big endian), uvarint time; then, of a gap, uvarint
// from and before; of an event, QoS, uvarint expiry, and with a uvarint of their
// length each the JSON of the properties (0 for none) and the topic; payload.
const (
	sumAt     = 2
	eventHead = sumAt + 8 + 8
	flagGap   = 1
)

func encodeEvent(e *Event) []byte {
	var props []byte
	if !e.Props.Zero() {
		props, _ = json.Marshal(e.Props)
	}
	v := make([]byte, sumAt+8, eventHead+1+4*binary.MaxVarintLen64+len(props)+len(e.Topic)+len(e.Payload))
	v[0] = 1
	v = binary.BigEndian.AppendUint64(v, e.Epoch)
	v = binary.AppendUvarint(v, uint64(e.Time))
	if e.Gap != nil {
		v[1] = flagGap
		v = binary.AppendUvarint(v, e.Gap.From)
		return binary.AppendUvarint(v, e.Gap.Before)
	}
	v = append(v, e.QoS)
	v = binary.AppendUvarint(v, uint64(e.Expires))
	v = binary.AppendUvarint(v, uint64(len(props)))
	v = append(v, props...)
	v = binary.AppendUvarint(v, uint64(len(e.Topic)))
	v = append(v, e.Topic...)
	return append(v, e.Payload...)
}

func decodeEvent(k, v []byte) (Event, error) {
	bad := func() error { return fmt.Errorf("%w: event record %x", errCorrupt, k) }
	if len(k) != eventKeyLen || len(v) < eventHead || v[0] != 1 {
		return Event{}, bad()
	}
	e := Event{
		Seq: binary.BigEndian.Uint64(k[1:]),
		Sum: binary.LittleEndian.Uint64(v[sumAt:]), Epoch: binary.BigEndian.Uint64(v[sumAt+8:]),
	}
	gap := v[1]&flagGap != 0
	size := recordBytes(v)
	v = v[eventHead:]
	broken := false
	number := func() uint64 {
		x, n := binary.Uvarint(v)
		if n <= 0 {
			broken, v = true, nil
			return 0
		}
		v = v[n:]
		return x
	}
	text := func() []byte {
		n := number()
		if n > uint64(len(v)) {
			broken, v = true, nil
			return nil
		}
		t := v[:n]
		v = v[n:]
		return t
	}
	e.Time = int64(number())
	if gap {
		e.Gap = &EventGap{From: number(), Before: number()}
		e.Before = e.Sum // what it replaced is gone
		if broken || e.Gap.From == 0 || e.Gap.From > e.Seq || e.Gap.Before > e.Sum {
			return Event{}, bad()
		}
		return e, nil
	}
	if len(v) == 0 || size > e.Sum {
		return Event{}, bad()
	}
	e.Before = e.Sum - size
	e.QoS, v = v[0], v[1:]
	e.Expires = int64(number())
	if props := text(); len(props) > 0 {
		if err := json.Unmarshal(props, &e.Props); err != nil {
			return Event{}, fmt.Errorf("%w: %w", bad(), err)
		}
	}
	e.Topic = string(text())
	if broken || e.Topic == "" {
		return Event{}, bad()
	}
	e.Payload = append([]byte(nil), v...)
	return e, nil
}

// showEvent and showMark are what dump shows.
func showEvent(name string, v []byte) (any, error) {
	e, err := decodeEvent(append([]byte{keyEvent}, name...), v)
	if err != nil {
		return nil, err
	}
	out := struct {
		Seq     uint64 `json:"seq"`
		Epoch   string `json:"epoch"`
		Time    int64  `json:"t"`
		From    uint64 `json:"gapFrom,omitempty"`
		Topic   string `json:"topic,omitempty"`
		Payload Text   `json:"payload,omitempty"`
		QoS     byte   `json:"qos,omitempty"`
		Expires int64  `json:"expires,omitempty"`
		Props   Props  `json:"props,omitzero"`
	}{e.Seq, fmt.Sprintf("%016x", e.Epoch), e.Time, 0, e.Topic, e.Payload, e.QoS, e.Expires, e.Props}
	if e.Gap != nil {
		out.From = e.Gap.From
	}
	return out, nil
}

func showMark(name string, v []byte) (any, error) {
	_, _, m, err := decodeMark(name, v)
	return m, err
}
