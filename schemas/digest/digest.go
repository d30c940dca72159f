// Package digest keeps the set behind repair: topic → hash, and over it a digest
// that does not depend on order, so that a change costs O(1).
//
//	s := digest.NewSet()
//	s.Put("fl/plant-7/desired/pod/default/web", payload)
//	fmt.Println(s.Count(), s.Sum())
//
// A topic's hash is the first 16 bytes of SHA-256 over the topic, a zero byte
// and the payload. The digest is the sum of the hashes as 128-bit numbers
// modulo 2^128, written as 32 hexadecimal digits. SHA-256 keeps payloads that
// somebody chose from cancelling each other by accident; it is no signature.
package digest

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/bits"
	"slices"
)

// Hash stands for one topic's payload.
type Hash [16]byte

// Of hashes a payload under its topic.
func Of(topic string, payload []byte) Hash {
	h := sha256.New()
	h.Write([]byte(topic))
	h.Write([]byte{0})
	h.Write(payload)
	var sum [sha256.Size]byte
	return Hash(h.Sum(sum[:0])[:16])
}

// String gives 32 hexadecimal digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText writes the hash as 32 hexadecimal digits.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads 32 hexadecimal digits.
func (h *Hash) UnmarshalText(b []byte) error {
	if len(b) != 32 {
		return fmt.Errorf("hash %.40q: want 32 hexadecimal digits", b)
	}
	if _, err := hex.Decode(h[:], b); err != nil {
		return fmt.Errorf("hash %.40q: %w", b, err)
	}
	return nil
}

// Set is the topics of one writer for one node and direction. It is not safe
// for concurrent use; its owner is one goroutine.
type Set struct {
	topics map[string]Hash
	hi, lo uint64
}

// NewSet gives an empty set, whose digest is all zeros.
func NewSet() *Set { return &Set{topics: map[string]Hash{}} }

// Put records the payload under the topic; an empty payload removes it, as a
// retained message with an empty payload does. It tells whether the set changed.
func (s *Set) Put(topic string, payload []byte) bool {
	if len(payload) == 0 {
		return s.Remove(topic)
	}
	return s.PutHash(topic, Of(topic, payload))
}

// PutHash records a hash under the topic and tells whether the set changed.
func (s *Set) PutHash(topic string, h Hash) bool {
	old, ok := s.topics[topic]
	if ok && old == h {
		return false
	}
	if ok {
		s.sub(old)
	}
	s.topics[topic] = h
	s.add(h)
	return true
}

// Remove takes the topic out and tells whether it was there.
func (s *Set) Remove(topic string) bool {
	old, ok := s.topics[topic]
	if ok {
		delete(s.topics, topic)
		s.sub(old)
	}
	return ok
}

// Get gives the topic's hash.
func (s *Set) Get(topic string) (Hash, bool) {
	h, ok := s.topics[topic]
	return h, ok
}

// Count is the number of topics.
func (s *Set) Count() int { return len(s.topics) }

// Sum is the digest over the set.
func (s *Set) Sum() Hash {
	var h Hash
	binary.BigEndian.PutUint64(h[:8], s.hi)
	binary.BigEndian.PutUint64(h[8:], s.lo)
	return h
}

// Topics lists the topics after the given one, sorted, at most n of them
// (all for n ≤ 0).
func (s *Set) Topics(after string, n int) []string {
	size := len(s.topics)
	if n > 0 { // a page of a large set must not cost sorting it whole
		size = min(size, 2*n+64)
	}
	out := make([]string, 0, size)
	last := "" // what is behind it is too many
	for t := range s.topics {
		if t <= after || last != "" && t > last {
			continue
		}
		if out = append(out, t); n > 0 && len(out) == 2*n+64 {
			slices.Sort(out)
			out = out[:n]
			last = out[n-1]
		}
	}
	slices.Sort(out)
	if n > 0 && len(out) > n {
		out = out[:n]
	}
	return out
}

func (s *Set) add(h Hash) {
	var c uint64
	s.lo, c = bits.Add64(s.lo, binary.BigEndian.Uint64(h[8:]), 0)
	s.hi, _ = bits.Add64(s.hi, binary.BigEndian.Uint64(h[:8]), c)
}

func (s *Set) sub(h Hash) {
	var b uint64
	s.lo, b = bits.Sub64(s.lo, binary.BigEndian.Uint64(h[8:]), 0)
	s.hi, _ = bits.Sub64(s.hi, binary.BigEndian.Uint64(h[:8]), b)
}
