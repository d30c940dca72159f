// Package client is Fairlead's MQTT 5 client: a thin layer over paho.golang that
// connects and reconnects, makes its subscriptions before anything else, tells
// the outcome of every publish and notices a dead link within 1.5 keepalives.
// It works against any MQTT 5 broker.
//
//	c, err := client.New(client.Config{URL: "mqtt://127.0.0.1:1883", ClientID: "probe",
//		Subscriptions: []client.Subscription{{Filter: "fl/#", QoS: 1}},
//		OnMessage:     func(m client.Message) { fmt.Println(m.Topic) }})
//	go c.Run(ctx)
//
// Sessions are clean: whoever uses the client holds sets and repairs them, and
// does not depend on having seen every message.
package client
