// Package seal encrypts what only one node may read: Secrets and service account
// tokens on their way over brokers and through stores that others can read.
//
//	k, err := seal.NewKey() // on the node, once; Public goes into reported/node
//	s, err := seal.Seal(k.Public(), topic.DesiredSecret("plant-7", "default", "tls"), uid, rev, plain)
//	plain, err := k.OpenPayload(topic.DesiredSecret("plant-7", "default", "tls"), s)
//
// It is HPKE (RFC 9180) in base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
// ChaCha20-Poly1305, info "fairlead seal v1". The additional data is the topic, a
// zero byte, the uid, a zero byte and the rev in decimal, so that a sealed payload
// cannot be moved to another topic or object, or given another rev. It proves
// nothing of who sealed it: that is the access rules' business.
package seal

import (
	"crypto/ecdh"
	"crypto/hpke"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const info = "fairlead seal v1"

// encapsulated is the length of the encapsulated key in front of the ciphertext.
const encapsulated = 32

// ErrKey is wrapped by the error of [Key.OpenPayload] for what was sealed to another key.
var ErrKey = errors.New("sealed to another key")

// Key is a node's private key.
type Key struct {
	private hpke.PrivateKey
}

func kem() hpke.KEM { return hpke.DHKEM(ecdh.X25519()) }

// NewKey makes a key.
func NewKey() (*Key, error) {
	p, err := kem().GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("make a seal key: %w", err)
	}
	return &Key{p}, nil
}

// ParseKey reads what [Key.Bytes] gave.
func ParseKey(b []byte) (*Key, error) {
	p, err := kem().NewPrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("seal key: want the 32 bytes of an X25519 private key: %w", err)
	}
	return &Key{p}, nil
}

// Bytes is the private key, 32 bytes.
func (k *Key) Bytes() ([]byte, error) { return k.private.Bytes() }

// Public is the public key as it travels in reported/node: base64 of 32 bytes.
func (k *Key) Public() string {
	return base64.StdEncoding.EncodeToString(k.private.PublicKey().Bytes())
}

// ID names the key in what is sealed to it.
func (k *Key) ID() string { return id(k.private.PublicKey()) }

// ID names a public key: 16 hexadecimal digits. An error is a key that is none.
func ID(public string) (string, error) {
	p, err := parse(public)
	if err != nil {
		return "", err
	}
	return id(p), nil
}

func id(p hpke.PublicKey) string {
	sum := sha256.Sum256(p.Bytes())
	return hex.EncodeToString(sum[:8])
}

func parse(public string) (hpke.PublicKey, error) {
	b, err := base64.StdEncoding.DecodeString(public)
	if err == nil {
		var p hpke.PublicKey
		if p, err = kem().NewPublicKey(b); err == nil {
			return p, nil
		}
	}
	return nil, fmt.Errorf("seal key %.80q: want base64 of the 32 bytes of an X25519 public key: %w", public, err)
}

func additional(t topic.Topic, uid string, rev int64) []byte {
	b := append([]byte(t), 0)
	b = append(append(b, uid...), 0)
	return strconv.AppendInt(b, rev, 10)
}

// Seal encrypts plain for the holder of the public key, for this topic, uid and rev.
func Seal(public string, t topic.Topic, uid string, rev int64, plain []byte) (payload.Sealed, error) {
	p, err := parse(public)
	if err != nil {
		return payload.Sealed{}, err
	}
	enc, s, err := hpke.NewSender(p, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), []byte(info))
	if err != nil {
		return payload.Sealed{}, fmt.Errorf("seal %q: %w", t, err)
	}
	text, err := s.Seal(additional(t, uid, rev), plain)
	if err != nil {
		return payload.Sealed{}, fmt.Errorf("seal %q: %w", t, err)
	}
	return payload.Sealed{UID: uid, Rev: rev, Key: id(p), Sealed: append(enc, text...)}, nil
}

// OpenPayload decrypts what came on the topic. The error wraps [ErrKey] where it was
// sealed to another key.
func (k *Key) OpenPayload(t topic.Topic, s payload.Sealed) ([]byte, error) {
	if s.Key != k.ID() {
		return nil, fmt.Errorf("open %q: %w: %.40q, this node's is %s", t, ErrKey, s.Key, k.ID())
	}
	if len(s.Sealed) < encapsulated {
		return nil, fmt.Errorf("open %q: %d bytes are too few", t, len(s.Sealed))
	}
	r, err := hpke.NewRecipient(s.Sealed[:encapsulated], k.private, hpke.HKDFSHA256(), hpke.ChaCha20Poly1305(), []byte(info))
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", t, err)
	}
	plain, err := r.Open(additional(t, s.UID, s.Rev), s.Sealed[encapsulated:])
	if err != nil {
		return nil, fmt.Errorf("open %q: it was changed, or sealed for another topic, uid or rev: %w", t, err)
	}
	return plain, nil
}
