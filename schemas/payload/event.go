package payload

import (
	"fmt"
	"strconv"
)

// EventGap is fl/<node>/event/gap: events that the node's log numbered From to To
// are not in the stream. It stands in their place.
type EventGap struct {
	// Epoch is that of the event To.
	Epoch string `json:"epoch"`
	From  uint64 `json:"from"`
	To    uint64 `json:"to"`
	// Count is the number of events missing, Bytes what they took in the log.
	Count uint64 `json:"count"`
	Bytes uint64 `json:"bytes"`
	// T is when the last of them was dropped.
	T int64 `json:"t"`
	// Err is the cloud broker's reason where it refused the event; empty where
	// the log's bounds dropped it.
	Err string `json:"err,omitempty"`
}

// The MQTT 5 user properties of an event on its way from the node to the cloud.
// All names that begin with [EventReserved] are the node's.
const (
	EventReserved = "fl-"
	// EventEpoch names the run of the node's broker that numbered the event.
	EventEpoch = "fl-epoch"
	// EventSeq is the event's number, decimal; it rises by one per event.
	EventSeq = "fl-seq"
	// EventTime is when the node's broker took the event.
	EventTime = "fl-t"
	// EventFirst is "1" on the first event of a replay: those before it, if any,
	// will not come.
	EventFirst = "fl-first"
)

// EventID is where an event stands in its node's log.
type EventID struct {
	Epoch string
	Seq   uint64
	// Time is when the log took it.
	Time int64
	// First begins a replay.
	First bool
}

// maxEpoch bounds the length of an epoch's name.
const maxEpoch = 32

// UserProperties are the user properties that say so.
func (id EventID) UserProperties() [][2]string {
	out := make([][2]string, 0, 4)
	out = append(out, [2]string{EventEpoch, id.Epoch}, [2]string{EventSeq, strconv.FormatUint(id.Seq, 10)},
		[2]string{EventTime, strconv.FormatInt(id.Time, 10)})
	if id.First {
		out = append(out, [2]string{EventFirst, "1"})
	}
	return out
}

// ReadEventID finds an event's place in its user properties. ok is false where
// they name neither epoch nor seq; one without the other, or what cannot be
// read, is an error.
func ReadEventID(user [][2]string) (id EventID, ok bool, err error) {
	number := ""
	for _, u := range user {
		switch u[0] {
		case EventEpoch:
			id.Epoch = u[1]
		case EventSeq:
			number = u[1]
		case EventTime:
			if id.Time, err = strconv.ParseInt(u[1], 10, 64); err != nil {
				return id, false, fmt.Errorf("user property %s: want milliseconds since 1970, got %.40q", EventTime, u[1])
			}
		case EventFirst:
			id.First = u[1] == "1"
		}
	}
	if id.Epoch == "" && number == "" {
		return id, false, nil
	}
	if len(id.Epoch) == 0 || len(id.Epoch) > maxEpoch {
		return id, false, fmt.Errorf("user property %s: want 1 to %d characters, got %.40q", EventEpoch, maxEpoch, id.Epoch)
	}
	if id.Seq, err = strconv.ParseUint(number, 10, 64); err != nil || id.Seq == 0 {
		return id, false, fmt.Errorf("user property %s: want a number from 1, got %.40q", EventSeq, number)
	}
	return id, true, nil
}
