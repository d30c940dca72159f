package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2"
)

// NeverExpires is a session's Expiry for one that ends only when its client says so.
const NeverExpires = math.MaxUint32

// Key spaces of sessions; n, num and ids are big-endian.
const (
	keySession      = 's' // + client id
	keySubscription = 'u' // + num + filter
	keyQueued       = 'q' // + num + n
	keyReleased     = 'p' // + num + n
	keyReceived     = 'i' // + num + packet id
)

// Session is a client's session as it is stored.
type Session struct {
	ClientID string `json:"-"`
	// Num names the session in the keys of what belongs to it.
	Num uint64 `json:"num"`
	// Expiry is how long the session outlives its connection, in seconds.
	Expiry uint32 `json:"expiry"`
	// Left is when the client went, in milliseconds since 1970; 0 while it is connected.
	Left int64 `json:"left,omitempty"`
	// Next is a number that the next message may have, as far as known.
	Next uint64 `json:"next"`
	// Sent is the newest number that went out, as far as known.
	Sent uint64 `json:"sent,omitempty"`
	// Replays are subscriptions whose retained messages are not all queued yet.
	Replays []Replay `json:"replays,omitempty"`
}

// Replay is how far the retained messages of a new subscription are queued.
type Replay struct {
	Filter string `json:"filter"`
	QoS    byte   `json:"qos"`
	SubID  int    `json:"subId,omitempty"`
	After  string `json:"after,omitempty"` // the last topic that was queued
}

// Subscription is one of a session.
type Subscription struct {
	Filter            string `json:"-"`
	QoS               byte   `json:"qos"`
	ID                int    `json:"id,omitempty"`
	NoLocal           bool   `json:"noLocal,omitempty"`
	RetainAsPublished bool   `json:"rap,omitempty"`
	RetainHandling    byte   `json:"rh,omitempty"`
}

// Queued is a message that waits for a session's client.
type Queued struct {
	// N is its number: the order of the queue, and what its packet id comes from.
	N      uint64
	QoS    byte // as it is sent
	Retain bool // as it is sent
	SubIDs []int
	// Share is the filter of the shared subscription that it came by, or empty.
	Share   string
	Topic   string
	Payload []byte
	// Expires is when the message dies, in milliseconds since 1970; 0 is never.
	Expires int64
	Props   Props
	// Size is what it counts in the queue, as Enqueue gave it.
	Size int
}

// Stored is a session with all that belongs to it but its messages.
type Stored struct {
	Session
	Subscriptions []Subscription
	// Received are the packet ids of QoS 2 publishes whose PUBREL has not come.
	Received []uint16
	// Released are the numbers of messages whose PUBREC has come, in order.
	Released []uint64
	// Messages and Bytes are what is queued; First is the first number, Last the
	// last, Window that of the window-th message or else the last.
	Messages            int
	Bytes               int64
	First, Window, Last uint64
}

// Sessions reads all sessions. window is how many messages of one may be in flight.
func (s *Store) Sessions(window int) ([]Stored, error) {
	var out []Stored
	err := s.each(keySession, func(name string, v []byte) error {
		r := Stored{Session: Session{ClientID: name}}
		if err := json.Unmarshal(v, &r.Session); err != nil {
			return fmt.Errorf("%w: session of %q: %w", errCorrupt, name, err)
		}
		out = append(out, r)
		return nil
	})
	for i := range out {
		if err == nil {
			err = s.session(&out[i], window)
		}
	}
	return out, err
}

func (s *Store) session(r *Stored, window int) error {
	bad := func(what string) error { return fmt.Errorf("%w: %s of session %q", errCorrupt, what, r.ClientID) }
	err := s.under(keySubscription, r.Num, func(k, v []byte) error {
		sub := Subscription{Filter: string(k)}
		if json.Unmarshal(v, &sub) != nil {
			return bad("subscription")
		}
		r.Subscriptions = append(r.Subscriptions, sub)
		return nil
	})
	if err != nil {
		return err
	}
	err = s.under(keyReceived, r.Num, func(k, _ []byte) error {
		if len(k) != 2 {
			return bad("packet id")
		}
		r.Received = append(r.Received, binary.BigEndian.Uint16(k))
		return nil
	})
	if err != nil {
		return err
	}
	err = s.under(keyReleased, r.Num, func(k, _ []byte) error {
		if len(k) != 8 {
			return bad("released number")
		}
		r.Released = append(r.Released, binary.BigEndian.Uint64(k))
		return nil
	})
	if err != nil {
		return err
	}
	return s.under(keyQueued, r.Num, func(k, v []byte) error {
		if len(k) != 8 {
			return bad("message number")
		}
		n := binary.BigEndian.Uint64(k)
		if r.Messages == 0 {
			r.First = n
		}
		r.Last = n
		if r.Messages++; r.Messages <= window {
			r.Window = n
		}
		r.Bytes += int64(QueuedSize(len(v)))
		return nil
	})
}

// QueuedSize is what a message of so many bytes counts in a queue: keys and
// the store's own records take their share.
func QueuedSize(encoded int) int { return encoded + 64 }

// Queue reads up to limit messages of a session, from a number on, and not more
// than about maxBytes, but at least one.
func (s *Store) Queue(num, from uint64, limit, maxBytes int) ([]Queued, error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: numKey(keyQueued, num, from), UpperBound: numKey(keyQueued, num+1)})
	if err != nil {
		return nil, fmt.Errorf("store %s: %w", s.dir, err)
	}
	var out []Queued
	size := 0
	for ok := it.First(); ok && len(out) < limit && size < maxBytes; ok = it.Next() {
		k := it.Key()
		if len(k) != 17 {
			err = fmt.Errorf("%w: queue key %x", errCorrupt, k)
			break
		}
		q, derr := decodeQueued(it.Value())
		if derr != nil {
			err = derr
			break
		}
		q.N = binary.BigEndian.Uint64(k[9:])
		q.Size = QueuedSize(len(it.Value()))
		size += len(it.Value())
		out = append(out, q)
	}
	if err := errors.Join(err, it.Error(), it.Close()); err != nil {
		return nil, fmt.Errorf("store %s: %w", s.dir, err)
	}
	return out, nil
}

// under calls fn for what belongs to a session in one key space, with the rest
// of the key. Neither slice is fn's to keep.
func (s *Store) under(space byte, num uint64, fn func(rest, v []byte) error) error {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: numKey(space, num), UpperBound: numKey(space, num+1)})
	if err != nil {
		return fmt.Errorf("store %s: %w", s.dir, err)
	}
	for ok := it.First(); ok; ok = it.Next() {
		if err := fn(it.Key()[9:], it.Value()); err != nil {
			return errors.Join(fmt.Errorf("store %s: %w", s.dir, err), it.Close())
		}
	}
	if err := errors.Join(it.Error(), it.Close()); err != nil {
		return fmt.Errorf("store %s: %w", s.dir, err)
	}
	return nil
}

// numKey is a key of a session's: space, num, and a number where there is one.
func numKey(space byte, num uint64, n ...uint64) []byte {
	k := make([]byte, 0, 17)
	k = binary.BigEndian.AppendUint64(append(k, space), num)
	for _, n := range n {
		k = binary.BigEndian.AppendUint64(k, n)
	}
	return k
}

// PutSession stores a session's own record.
func (b *Batch) PutSession(r Session) error {
	v, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("session of %q: %w", r.ClientID, err)
	}
	return b.b.Set(key(keySession, r.ClientID), v, nil)
}

// DeleteSession removes a session with all that belongs to it.
func (b *Batch) DeleteSession(clientID string, num uint64) {
	_ = b.b.Delete(key(keySession, clientID), nil)
	for _, space := range []byte{keySubscription, keyQueued, keyReleased, keyReceived} {
		_ = b.b.DeleteRange(numKey(space, num), numKey(space, num+1), nil)
	}
}

// PutSubscription stores a subscription.
func (b *Batch) PutSubscription(num uint64, sub Subscription) error {
	v, err := json.Marshal(sub)
	if err != nil {
		return fmt.Errorf("subscription %q: %w", sub.Filter, err)
	}
	return b.b.Set(append(numKey(keySubscription, num), sub.Filter...), v, nil)
}

// DeleteSubscription removes one.
func (b *Batch) DeleteSubscription(num uint64, filter string) {
	_ = b.b.Delete(append(numKey(keySubscription, num), filter...), nil)
}

// PutReceived notes the packet id of a QoS 2 publish.
func (b *Batch) PutReceived(num uint64, id uint16) {
	_ = b.b.Set(binary.BigEndian.AppendUint16(numKey(keyReceived, num), id), nil, nil)
}

// DeleteReceived forgets it: PUBREL has come.
func (b *Batch) DeleteReceived(num uint64, id uint16) {
	_ = b.b.Delete(binary.BigEndian.AppendUint16(numKey(keyReceived, num), id), nil)
}

// Enqueue stores a message under its number, which is used once, and gives its
// size.
func (b *Batch) Enqueue(num uint64, q *Queued) int {
	v := encodeQueued(q)
	_ = b.b.Set(numKey(keyQueued, num, q.N), v, nil)
	return QueuedSize(len(v))
}

// Dequeue removes a message.
func (b *Batch) Dequeue(num, n uint64) {
	// Written once, so that in memory already the two cancel out.
	_ = b.b.SingleDelete(numKey(keyQueued, num, n), nil)
}

// Release notes that the client has a QoS 2 message: PUBREC has come.
func (b *Batch) Release(num, n uint64) {
	b.Dequeue(num, n)
	_ = b.b.Set(numKey(keyReleased, num, n), nil, nil)
}

// Complete forgets a released message: PUBCOMP has come.
func (b *Batch) Complete(num, n uint64) { _ = b.b.Delete(numKey(keyReleased, num, n), nil) }

// A queued value is: format byte 1; flags; uvarint expiry; where flagged, a
// count and the subscription ids, the share's filter, the properties' JSON, each
// with its length; the topic with its length; payload.
const (
	queuedQoS    = 0x03
	queuedRetain = 0x04
	queuedSubIDs = 0x08
	queuedShare  = 0x10
	queuedProps  = 0x20
)

func encodeQueued(q *Queued) []byte {
	var props []byte
	flags := q.QoS & queuedQoS
	if q.Retain {
		flags |= queuedRetain
	}
	if len(q.SubIDs) > 0 {
		flags |= queuedSubIDs
	}
	if q.Share != "" {
		flags |= queuedShare
	}
	if !q.Props.Zero() {
		flags |= queuedProps
		props, _ = json.Marshal(q.Props)
	}
	v := make([]byte, 0, 24+len(q.Topic)+len(q.Payload)+len(props)+len(q.Share)+5*len(q.SubIDs))
	v = append(v, 1, flags)
	v = binary.AppendUvarint(v, uint64(q.Expires))
	if len(q.SubIDs) > 0 {
		v = binary.AppendUvarint(v, uint64(len(q.SubIDs)))
		for _, id := range q.SubIDs {
			v = binary.AppendUvarint(v, uint64(id))
		}
	}
	if q.Share != "" {
		v = append(binary.AppendUvarint(v, uint64(len(q.Share))), q.Share...)
	}
	if props != nil {
		v = append(binary.AppendUvarint(v, uint64(len(props))), props...)
	}
	v = append(binary.AppendUvarint(v, uint64(len(q.Topic))), q.Topic...)
	return append(v, q.Payload...)
}

func decodeQueued(v []byte) (Queued, error) {
	var q Queued
	bad := fmt.Errorf("%w: queued message", errCorrupt)
	if len(v) < 4 || v[0] != 1 || v[1]&queuedQoS == 3 {
		return q, bad
	}
	flags := v[1]
	v = v[2:]
	ok := true
	number := func() uint64 {
		n, w := binary.Uvarint(v)
		if w <= 0 {
			ok = false
			return 0
		}
		v = v[w:]
		return n
	}
	text := func() []byte {
		n := number()
		if !ok || n > uint64(len(v)) {
			ok = false
			return nil
		}
		t := v[:n]
		v = v[n:]
		return t
	}
	q.QoS, q.Retain = flags&queuedQoS, flags&queuedRetain != 0
	q.Expires = int64(number())
	if flags&queuedSubIDs != 0 {
		n := number()
		if !ok || n > uint64(len(v)) {
			return q, bad
		}
		for range n {
			q.SubIDs = append(q.SubIDs, int(number()))
		}
	}
	if flags&queuedShare != 0 {
		q.Share = string(text())
	}
	if flags&queuedProps != 0 {
		if p := text(); !ok || json.Unmarshal(p, &q.Props) != nil {
			return q, bad
		}
	}
	q.Topic = string(text())
	if !ok {
		return q, bad
	}
	q.Payload = append([]byte(nil), v...)
	return q, nil
}
