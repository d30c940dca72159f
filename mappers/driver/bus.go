package driver

import (
	"context"
	"errors"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Bus is the node's bus as the kit needs it. [NewMQTT] makes the real one.
type Bus interface {
	// Run connects, subscribes the filters in their order at every connect,
	// feeds the receiver and reconnects until ctx ends. It is called once.
	Run(ctx context.Context, filters []topic.Filter, r Receiver) error
	// Publish sends a retained message at QoS 1 and waits until the bus has
	// acknowledged it. [ErrRefused] is wrapped where the bus will never take
	// it. Called from several goroutines, not for one topic at a time; payload
	// is not kept after it returns.
	Publish(ctx context.Context, t topic.Topic, payload []byte) error
}

// Receiver takes what the bus says. Its methods do not block and may be called
// from several goroutines; a Down separates the messages of two connections.
type Receiver interface {
	// Message hands over a message; payload is the receiver's from then on.
	Message(t topic.Topic, payload []byte)
	// Up follows a connect, once the subscriptions are acknowledged.
	Up()
	// Down follows the loss of a connection.
	Down(err error)
}

// ErrRefused is wrapped by Publish's error for a message the bus does not accept.
var ErrRefused = errors.New("refused by the bus")
