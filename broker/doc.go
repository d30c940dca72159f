// Package broker is the MQTT broker of both the cloud and the edge: mochi as
// the protocol engine, and on its hooks our own routing, acknowledgement,
// delivery queues, access rules and Pebble store.
//
//	b, err := broker.Open(broker.Options{Dir: dir, Node: "plant-7", Authenticate: auth})
//	err = b.Listen("127.0.0.1:1883")
//	err = b.Publish(ctx, broker.Message{Topic: t, Payload: p, Retain: true})
//	defer b.Close()
//
// One goroutine, the core, takes every publish in order: it asks the
// interceptors, writes one batch, and only after the batch is on the disk
// acknowledges and hands the messages to the subscribers' queues. So an
// acknowledged message is stored, messages of one publisher keep their order,
// and an interceptor sees a state that nobody else is changing.
//
// Locks: a connection's mu is a leaf. retained.mu is held for map work only,
// never while anything is sent or stored.
package broker
