// Package payload holds the JSON payloads of the wire contract as Go structs.
// Their exact bytes are pinned by the goldens in testdata/.
//
//	b := payload.Encode(payload.Reading{V: json.RawMessage("21.5"), T: 1790000000123})
//	// {"v":21.5,"t":1790000000123}
//
// Time is milliseconds since 1970 everywhere. A rev is a millisecond time that
// never repeats for its topic: max(previous + 1, now), so that of two wishes
// the newer has the larger rev, whoever made it.
package payload

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/fairlead-io/fairlead/schemas/digest"
)

// Link is fl/<node>/reported/link: whether the node is connected to the cloud
// broker. The node writes online, its Will writes offline.
type Link struct {
	Online bool `json:"online"`
	// Since is when the node connected; in the Will too, where it names the
	// connection that ended rather than the time of the end.
	Since int64 `json:"since"`
	// Agent is the version of the edge agent.
	Agent string `json:"agent,omitempty"`
	// Epoch is that of the node's digests: it tells two agents of one name apart.
	Epoch string `json:"epoch,omitempty"`
	// Host says on which machine the agent runs, for a person.
	Host string `json:"host,omitempty"`
}

// Digest is fl/<node>/desired/digest and fl/<node>/reported/digest.
type Digest struct {
	// Epoch names the writer's numbering; revs compare only within one epoch.
	// Every start of a writer takes a new one, as its store may be an old copy.
	Epoch string `json:"epoch"`
	// Count is the number of topics in the set.
	Count int `json:"count"`
	// Sum is the digest over the set, 32 hexadecimal digits.
	Sum digest.Hash `json:"sum"`
}

// Quality words. The empty quality is good. A bad one is "bad:" and a reason;
// the value is then null and the last good one is kept in lv.
const (
	QualityTimeout     = "bad:timeout"     // the device did not answer in time
	QualityUnreachable = "bad:unreachable" // no connection to the device
	QualityDevice      = "bad:device"      // the device answered with an error
	QualityValue       = "bad:value"       // the device's answer is no value of the type
	QualityStale       = "bad:stale"       // older than the property's maximum age
	QualityConfig      = "bad:config"      // the mapper cannot serve the property as described
)

// Reading is fl/<node>/reported/twin/<ns>/<device>/<property>.
type Reading struct {
	// V is the value, or null where the quality is bad.
	V json.RawMessage `json:"v"`
	// LV is the last good value, present where the quality is bad and there was one.
	LV json.RawMessage `json:"lv,omitempty"`
	// T is when the source produced V or noticed the bad quality.
	T int64 `json:"t"`
	// Q is the quality; empty is good.
	Q string `json:"q,omitempty"`
	// Ack is the rev of the last target the mapper has finished with.
	Ack int64 `json:"ack,omitempty"`
	// Err says why that target was not applied; empty where it was.
	Err string `json:"err,omitempty"`
}

// Good tells whether V is a value.
func (r *Reading) Good() bool { return r.Q == "" }

// Wish is fl/<node>/desired/twin/<ns>/<device>/<property>: the value the cloud wants.
type Wish struct {
	V json.RawMessage `json:"v"`
	// Rev orders wishes: the newer has the larger one.
	Rev int64 `json:"rev"`
	// UID is the device's, so that a wish cannot outlive its device.
	UID string `json:"uid"`
	// Exp is when the wish loses its force; 0 is never.
	Exp int64 `json:"exp,omitempty"`
}

// Target is fl/<node>/reported/target/<ns>/<device>/<property>: what the device
// is being driven to, and so what a mapper applies.
type Target struct {
	V json.RawMessage `json:"v"`
	// Rev is the target's own; equal to the wish's where nothing intervened.
	Rev int64 `json:"rev"`
	// UID is the device's.
	UID string `json:"uid"`
	// By is "cloud" or "local".
	By string `json:"by"`
	// Who is the client that wished locally.
	Who string `json:"who,omitempty"`
	// T is when the node took the wish for its target.
	T int64 `json:"t"`
	// Wish is the rev of the cloud's wish, where it differs from Rev.
	Wish int64 `json:"wish,omitempty"`
	// Exp is when the wish loses its force; 0 is never.
	Exp int64 `json:"exp,omitempty"`
}

// The values of Target.By.
const (
	ByCloud = "cloud"
	ByLocal = "local"
)

// CloudRev is the rev of the cloud's wish that the target carries out, or 0.
func (t *Target) CloudRev() int64 {
	switch {
	case t.By != ByCloud:
		return 0
	case t.Wish != 0:
		return t.Wish
	default:
		return t.Rev
	}
}

// Set is the payload of fl/<node>/set/<ns>/<device>/<property> in its long form.
type Set struct {
	V json.RawMessage `json:"v"`
	// Exp is when the wish loses its force; 0 is never.
	Exp int64 `json:"exp,omitempty"`
	// If is the target's rev that the writer saw; another one refuses the wish.
	If int64 `json:"if,omitempty"`
}

// SetReply goes to the response topic of a set, where one was asked for.
type SetReply struct {
	OK bool `json:"ok"`
	// Rev is the target's new rev.
	Rev int64 `json:"rev,omitempty"`
	// Reason is the word for the refusal, Error the sentence.
	Reason string `json:"reason,omitempty"`
	Error  string `json:"error,omitempty"`
}

// DeviceStatus is fl/<node>/reported/device/<ns>/<name>, written by the mapper.
type DeviceStatus struct {
	UID string `json:"uid"`
	// Rev is the rev of the resolved device that the mapper serves.
	Rev int64 `json:"rev"`
	// State is one of the DeviceState words.
	State string `json:"state"`
	// Since is when the state began.
	Since int64 `json:"since"`
	// Error is the last one, for a person.
	Error string `json:"error,omitempty"`
	// Mapper names the mapper that serves the device.
	Mapper string `json:"mapper,omitempty"`
}

// The states of a device.
const (
	DeviceOnline  = "Online"  // every property that is read was read
	DeviceOffline = "Offline" // nothing could be read
	DeviceError   = "Error"   // it answers, but not for every property
)

// SyncRequest goes to fl/<node>/sync/<direction>/request: the receiver of a
// direction asks its writer for a page of the manifest, or for topics to be
// published again, or both.
type SyncRequest struct {
	// Manifest asks for a page of the manifest, after the topic After.
	Manifest bool   `json:"manifest,omitempty"`
	After    string `json:"after,omitempty"`
	// Max bounds the topics of the page; 0 leaves it to the writer.
	Max int `json:"max,omitempty"`
	// Want lists topics that the writer shall publish again, before the page;
	// one it does not have is cleared with an empty retained message.
	Want []string `json:"want,omitempty"`
}

// SyncManifest goes to fl/<node>/sync/<direction>/manifest: a page of the writer's
// set, sorted by topic.
type SyncManifest struct {
	Digest Digest `json:"digest"`
	// After is the request's; the page holds what follows it.
	After string `json:"after,omitempty"`
	// Topics maps topic to hash. Topics are written without "fl/<node>/".
	Topics map[string]digest.Hash `json:"topics"`
	// Next asks for the following page; empty on the last one.
	Next string `json:"next,omitempty"`
}

// Encode writes a payload. It panics on a struct that cannot be JSON, which no
// payload of this package is.
func Encode(v any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(fmt.Sprintf("payload: encode %T: %v", v, err))
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// Decode reads a payload. Unknown fields are ignored, as newer writers may send
// them; anything but exactly one JSON object is an error.
func Decode(b []byte, into any) error {
	if t := bytes.TrimSpace(b); len(t) == 0 || t[0] != '{' { // null would decode into anything
		return fmt.Errorf("payload %.80q: want a JSON object", b)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("payload %.80q: %w", b, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("payload %.80q: something follows the JSON value", b)
	}
	return nil
}

// ParseSet reads the payload of a set topic: {"v":…} with its options, or a
// bare JSON value.
func ParseSet(b []byte) (Set, error) {
	b = bytes.TrimSpace(b)
	if !json.Valid(b) {
		return Set{}, fmt.Errorf("payload %.80q is not JSON: want a bare value such as 40 or {\"v\":40}; a text needs its quotes", b)
	}
	if b[0] == '{' {
		var s Set
		d := json.NewDecoder(bytes.NewReader(b))
		d.DisallowUnknownFields() // a typo in "exp" must not become a wish for ever
		if err := d.Decode(&s); err != nil {
			return Set{}, fmt.Errorf("payload %.80q: %w; want {\"v\":…} with optional exp and if", b, err)
		}
		if len(s.V) == 0 {
			return Set{}, fmt.Errorf("payload %.80q has no \"v\"", b)
		}
		return s, nil
	}
	return Set{V: json.RawMessage(b)}, nil
}

// Millis is a time as it travels.
func Millis(t time.Time) int64 { return t.UnixMilli() }

// NextRev is the rev that follows prev at the time now.
func NextRev(prev int64, now time.Time) int64 { return max(prev+1, Millis(now)) }
