package seal_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

var tls = topic.DesiredSecret("plant-7", "default", "tls")

func newKey(t *testing.T) *seal.Key {
	t.Helper()
	k, err := seal.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestSealAndOpen(t *testing.T) {
	k := newKey(t)
	b, err := k.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	again, err := seal.ParseKey(b) // as after a restart of the node
	if err != nil || again.Public() != k.Public() || again.ID() != k.ID() {
		t.Fatalf("%v, %v", again, err)
	}
	if id, err := seal.ID(k.Public()); err != nil || id != k.ID() {
		t.Errorf("ID of the public key %q, %v; want %q", id, err, k.ID())
	}
	for _, plain := range []string{"", `{"type":"Opaque","data":{"k":"djEy"}}`, strings.Repeat("x", 1<<20)} {
		s, err := seal.Seal(k.Public(), tls, "uid", 7, []byte(plain))
		if err != nil {
			t.Fatal(err)
		}
		if len(plain) > 0 && bytes.Contains(s.Sealed, []byte(plain)) {
			t.Error("the plaintext is readable")
		}
		if s.UID != "uid" || s.Rev != 7 || s.Key != k.ID() {
			t.Errorf("%+v", s)
		}
		got, err := again.OpenPayload(tls, s)
		if err != nil || string(got) != plain {
			t.Errorf("opened %.40q, %v", got, err)
		}
		twice, err := seal.Seal(k.Public(), tls, "uid", 7, []byte(plain))
		if err != nil || bytes.Equal(twice.Sealed, s.Sealed) {
			t.Errorf("sealed twice, the bytes are the same (%v)", err)
		}
	}
}

// TestOpenRefuses: what was sealed opens for its key, topic, uid and rev alone.
func TestOpenRefuses(t *testing.T) {
	k := newKey(t)
	for _, tc := range []struct {
		name   string
		topic  topic.Topic
		change func(*payload.Sealed)
		want   string
	}{
		{"another secret", topic.DesiredSecret("plant-7", "default", "other"), nil, "for another topic"},
		{"another node", topic.DesiredSecret("plant-8", "default", "tls"), nil, "for another topic"},
		{"another kind", topic.DesiredToken("plant-7", "default", "tls"), nil, "for another topic"},
		{"another uid", tls, func(s *payload.Sealed) { s.UID = "other" }, "for another topic"},
		{"another rev", tls, func(s *payload.Sealed) { s.Rev++ }, "for another topic"},
		{"a changed byte", tls, func(s *payload.Sealed) { s.Sealed[len(s.Sealed)-1] ^= 1 }, "it was changed"},
		{"a changed encapsulated key", tls, func(s *payload.Sealed) { s.Sealed[0] ^= 1 }, "it was changed"},
		{"cut short", tls, func(s *payload.Sealed) { s.Sealed = s.Sealed[:31] }, "too few"},
		{"nothing", tls, func(s *payload.Sealed) { s.Sealed = nil }, "too few"},
		{"a key of all zeros", tls, func(s *payload.Sealed) { clear(s.Sealed[:32]) }, "open"},
	} {
		s, err := seal.Seal(k.Public(), tls, "uid", 7, []byte("secret"))
		if err != nil {
			t.Fatal(err)
		}
		if tc.change != nil {
			tc.change(&s)
		}
		if got, err := k.OpenPayload(tc.topic, s); err == nil || !strings.Contains(err.Error(), tc.want) || got != nil {
			t.Errorf("%s: %q, %v; want %q", tc.name, got, err, tc.want)
		}
	}
	s, err := seal.Seal(newKey(t).Public(), tls, "uid", 7, []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.OpenPayload(tls, s); !errors.Is(err, seal.ErrKey) {
		t.Errorf("sealed to another key: %v", err)
	}
	s.Key = k.ID() // a name that is not true
	if _, err := k.OpenPayload(tls, s); err == nil {
		t.Error("opened what was sealed to another key")
	}
}

func TestBadKeys(t *testing.T) {
	for _, public := range []string{"", "AAAA", "not base64!", strings.Repeat("A", 100)} {
		if _, err := seal.Seal(public, tls, "uid", 1, nil); err == nil || !strings.Contains(err.Error(), "X25519 public key") {
			t.Errorf("Seal to %q: %v", public, err)
		}
		if _, err := seal.ID(public); err == nil {
			t.Errorf("ID of %q", public)
		}
	}
	// A point of small order gives everybody the same secret.
	if _, err := seal.Seal("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", tls, "uid", 1, nil); err == nil {
		t.Error("sealed to a key of all zeros")
	}
	if _, err := seal.ParseKey([]byte("short")); err == nil {
		t.Error("a private key of 5 bytes")
	}
}

// TestWire pins the construction: what another implementation sealed, or an
// older version, must open.
func TestWire(t *testing.T) {
	const (
		private = "0101010101010101010101010101010101010101010101010101010101010101"
		sealed  = "cb1a079d72be0bab56d7e4d10d91ec4b0189da2c96a8c25144989fd5e7fdd22470f3855923aeabdbca061e631264c8ac5aa98fb44fcbb93337292a9ba04c"
	)
	b, _ := hex.DecodeString(private)
	k, err := seal.ParseKey(b)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(sealed)
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.OpenPayload(tls, payload.Sealed{UID: "uid", Rev: 7, Key: "1a92f23852dc908d", Sealed: raw})
	if err != nil || string(got) != "attack at dawn" {
		t.Errorf("%q, %v", got, err)
	}
}
