package store

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/cockroachdb/pebble/v2"
)

// space is one kind of record, found under its key's first byte.
type space struct {
	name string
	// decode reads a record for a person: name is the key without its first
	// byte, the result is something that encoding/json writes. Every error means
	// that the record is damaged. It must not keep v.
	decode func(name string, v []byte) (any, error)
}

// spaces are all kinds of records: check, dump and repair know a record by what
// stands here. A new key space is one line.
var spaces = map[byte]space{
	keyFormat[0]:    {"format", showFormat},
	keyRetained:     {"retained", showRetained},
	keyWill:         {"wills", showWill},
	keySession:      {"sessions", showSession},
	keySubscription: {"subscriptions", showSubscription},
	keyQueued:       {"queued", showQueued},
	keyReleased:     {"released", showReleased},
	keyReceived:     {"received", showReceived},
	keyEvent:        {"events", showEvent},
	keyMark:         {"eventMarks", showMark},
}

// spaceName is the name of a key space, known or not.
func spaceName(b byte) string {
	if sp, ok := spaces[b]; ok {
		return sp.name
	}
	return fmt.Sprintf("unknown-%02x", b)
}

// decodeRecord reads any record of the store.
func decodeRecord(k, v []byte) (any, error) {
	if len(k) == 0 {
		return nil, fmt.Errorf("%w: record without a key", errCorrupt)
	}
	sp, ok := spaces[k[0]]
	if !ok {
		return nil, fmt.Errorf("%w: no record begins with the byte %02x", errCorrupt, k[0])
	}
	return sp.decode(string(k[1:]), v)
}

// Text is a byte string in a record that is shown: as text where it is some,
// else as {"base64": …}.
type Text []byte

// MarshalJSON implements [json.Marshaler].
func (t Text) MarshalJSON() ([]byte, error) {
	if utf8.Valid(t) {
		return json.Marshal(string(t))
	}
	return json.Marshal(struct {
		Base64 []byte `json:"base64"`
	}{t})
}

func showFormat(name string, v []byte) (any, error) {
	n, size := binary.Uvarint(v)
	if name != "" || size <= 0 || size != len(v) {
		return nil, fmt.Errorf("%w: format record %q = %x", errCorrupt, name, v)
	}
	return n, nil
}

func showRetained(name string, v []byte) (any, error) {
	r, err := decodeRetained(name, v)
	if err != nil {
		return nil, err
	}
	if len(r.Payload) == 0 {
		return nil, fmt.Errorf("%w: record of topic %q has no payload", errCorrupt, name)
	}
	return struct {
		Payload Text  `json:"payload"`
		QoS     byte  `json:"qos"`
		Expires int64 `json:"expires,omitempty"`
		Props   Props `json:"props,omitzero"`
	}{r.Payload, r.QoS, r.Expires, r.Props}, nil
}

func showWill(name string, v []byte) (any, error) {
	var w Will
	if err := json.Unmarshal(v, &w); err != nil {
		return nil, fmt.Errorf("%w: will of %q: %w", errCorrupt, name, err)
	}
	return struct {
		Topic   string `json:"topic"`
		Payload Text   `json:"payload"`
		QoS     byte   `json:"qos"`
		Retain  bool   `json:"retain"`
		Expiry  uint32 `json:"expiry,omitempty"`
		Props   Props  `json:"props,omitzero"`
	}{w.Topic, w.Payload, w.QoS, w.Retain, w.Expiry, w.Props}, nil
}

// Record is a record as `dump` shows it.
type Record struct {
	// Space is the name of the key space.
	Space string `json:"space"`
	// Key is the key without the space's byte; a key that is no printable text
	// is written in hex, after "0x".
	Key string `json:"key"`
	// Value is the decoded record, for encoding/json.
	Value any `json:"value,omitempty"`
	// Damage says why there is no value.
	Damage string `json:"damage,omitempty"`
}

// keyText writes the rest of a key for a person.
func keyText(b []byte) string {
	if utf8.Valid(b) && !strings.ContainsFunc(string(b), func(r rune) bool { return !unicode.IsPrint(r) }) {
		return string(b)
	}
	return "0x" + hex.EncodeToString(b)
}

// Dump calls fn for every record of a store that is not open, sorted by key
// space and key: of the named space only, unless it is empty, and of keys that
// begin with the prefix. A record that cannot be decoded has its Damage. It
// stops at fn's first error.
func Dump(dir, spaceFilter, prefix string, fn func(Record) error) error {
	if spaceFilter != "" && !knownSpace(spaceFilter) {
		return fmt.Errorf("no key space %q: there are %s", spaceFilter, strings.Join(SpaceNames(), ", "))
	}
	s, err := openReadOnly(dir)
	if err != nil {
		return err
	}
	err = s.guard(func() error {
		it, err := s.db.NewIter(nil)
		if err != nil {
			return err
		}
		for ok := it.First(); ok; ok = it.Next() {
			k := it.Key()
			name := spaceName(k[0])
			if spaceFilter != "" && name != spaceFilter || !strings.HasPrefix(string(k[1:]), prefix) {
				continue
			}
			r := Record{Space: name, Key: keyText(k[1:])}
			if r.Value, err = decodeRecord(k, it.Value()); err != nil {
				r.Value, r.Damage = nil, err.Error()
			}
			if err := fn(r); err != nil {
				return errors.Join(err, it.Close())
			}
		}
		return closeIter(it)
	})
	if err = errors.Join(err, s.closeReadOnly()); err != nil {
		return fmt.Errorf("store %s: %w", dir, err)
	}
	return nil
}

// SpaceNames lists the key spaces, sorted by their bytes.
func SpaceNames() []string {
	var out []string
	for b := range 256 {
		if sp, ok := spaces[byte(b)]; ok {
			out = append(out, sp.name)
		}
	}
	return out
}

func knownSpace(name string) bool {
	for _, sp := range spaces {
		if sp.name == name {
			return true
		}
	}
	return false
}

// closeIter closes an iterator that has come to its end, or says why it has not.
func closeIter(it *pebble.Iterator) error {
	err := it.Error()
	if cerr := it.Close(); err == nil {
		err = cerr
	}
	return err
}
