package store

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
)

// What dump shows of sessions; see session.go for the records.

func showSession(name string, v []byte) (any, error) {
	s := Session{ClientID: name}
	if err := json.Unmarshal(v, &s); err != nil {
		return nil, fmt.Errorf("%w: session of %q: %w", errCorrupt, name, err)
	}
	return s, nil
}

func showSubscription(name string, v []byte) (any, error) {
	num, filter, err := splitNum(name)
	if err != nil {
		return nil, err
	}
	var sub Subscription
	if err := json.Unmarshal(v, &sub); err != nil {
		return nil, fmt.Errorf("%w: subscription %q of session %d: %w", errCorrupt, filter, num, err)
	}
	return struct {
		Session uint64 `json:"session"`
		Filter  string `json:"filter"`
		Subscription
	}{num, filter, sub}, nil
}

func showQueued(name string, v []byte) (any, error) {
	num, n, err := splitNums(name)
	if err != nil {
		return nil, err
	}
	q, err := decodeQueued(v)
	if err != nil {
		return nil, err
	}
	return struct {
		Session uint64 `json:"session"`
		N       uint64 `json:"n"`
		Topic   string `json:"topic"`
		Payload Text   `json:"payload"`
		QoS     byte   `json:"qos"`
		Retain  bool   `json:"retain,omitempty"`
		Expires int64  `json:"expires,omitempty"`
		SubIDs  []int  `json:"subIds,omitempty"`
		Share   string `json:"share,omitempty"`
		Props   Props  `json:"props,omitzero"`
	}{num, n, q.Topic, q.Payload, q.QoS, q.Retain, q.Expires, q.SubIDs, q.Share, q.Props}, nil
}

func showReleased(name string, _ []byte) (any, error) {
	num, n, err := splitNums(name)
	return struct {
		Session uint64 `json:"session"`
		N       uint64 `json:"n"`
	}{num, n}, err
}

func showReceived(name string, _ []byte) (any, error) {
	num, id, err := splitNum(name)
	if err == nil && len(id) != 2 {
		err = fmt.Errorf("%w: packet id %x of session %d", errCorrupt, id, num)
	}
	if err != nil {
		return nil, err
	}
	return struct {
		Session uint64 `json:"session"`
		ID      uint16 `json:"id"`
	}{num, binary.BigEndian.Uint16([]byte(id))}, nil
}

// splitNum takes a session's number off a key.
func splitNum(name string) (num uint64, rest string, err error) {
	if len(name) < 8 {
		return 0, "", fmt.Errorf("%w: key %x names no session", errCorrupt, name)
	}
	return binary.BigEndian.Uint64([]byte(name)), name[8:], nil
}

// splitNums takes a session's number and a message's off a key.
func splitNums(name string) (num, n uint64, err error) {
	num, rest, err := splitNum(name)
	if err == nil && len(rest) != 8 {
		err = fmt.Errorf("%w: key %x names no message of session %d", errCorrupt, name, num)
	}
	if err != nil {
		return 0, 0, err
	}
	return num, binary.BigEndian.Uint64([]byte(rest)), nil
}
