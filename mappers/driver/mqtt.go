package driver

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// MQTT is the [Bus] over a broker.
type MQTT struct {
	url, name, token string
	log              *slog.Logger
	client           atomic.Pointer[client.Client] // set once by Run
}

// NewMQTT describes the bus at url (mqtt://host:port, ws://host:port/path or
// unix:///path) for the mapper called name. The token is its password; empty
// where the bus wants none.
func NewMQTT(url, name, token string, log *slog.Logger) *MQTT {
	return &MQTT{url: url, name: name, token: token, log: log}
}

// Run implements [Bus].
func (b *MQTT) Run(ctx context.Context, filters []topic.Filter, r Receiver) error {
	// The client identifier is new with every process, so that NoLocal (which
	// goes by it) hides this process's own readings but not those its
	// predecessor left retained. [MQTT-3.8.3-3]
	var nonce [4]byte
	_, _ = rand.Read(nonce[:]) // never fails since Go 1.24
	cfg := client.Config{
		URL:       b.url,
		ClientID:  "mapper-" + b.name + "-" + hex.EncodeToString(nonce[:]),
		Username:  "mapper:" + b.name,
		Password:  b.token,
		OnMessage: func(m client.Message) { r.Message(m.Topic, m.Payload) },
		OnUp:      func(context.Context) { r.Up() },
		OnDown:    r.Down,
		// The bus is on the same machine: it is back soon or not at all.
		MinBackoff: 100 * time.Millisecond,
		MaxBackoff: 2 * time.Second,
		Logger:     b.log,
	}
	for _, f := range filters {
		cfg.Subscriptions = append(cfg.Subscriptions, client.Subscription{Filter: f, QoS: 1, NoLocal: true})
	}
	c, err := client.New(cfg)
	if err != nil {
		return fmt.Errorf("bus %s: %w", b.url, err)
	}
	b.client.Store(c)
	return c.Run(ctx)
}

// Publish implements [Bus].
func (b *MQTT) Publish(ctx context.Context, t topic.Topic, payload []byte) error {
	c := b.client.Load()
	if c == nil {
		return client.ErrOffline
	}
	err := c.Publish(ctx, client.Message{Topic: t, Payload: payload, QoS: 1, Retain: true})
	var refused *client.Refused
	if errors.As(err, &refused) {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}
